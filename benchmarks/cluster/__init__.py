"""The simulator behind cluster_sim.py: `model` (what a part takes), `events` (what happens when), `calibrate` (from runs)."""
