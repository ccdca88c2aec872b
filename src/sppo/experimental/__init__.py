"""Methods that are still tried. Loaded by name where a recipe asks for them, never imported by the rest."""
