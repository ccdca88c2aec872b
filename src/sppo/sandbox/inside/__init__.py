"""What runs inside the jail: the standard library only, nothing of sppo. The files are handed in as they are here."""
