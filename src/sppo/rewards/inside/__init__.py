"""What scores reasoning-gym's problems inside a jail: the standard library and reasoning-gym only, nothing of sppo."""
