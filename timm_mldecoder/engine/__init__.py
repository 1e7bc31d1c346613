"""What train.py, validate.py and the commands run. CONTRIBUTING.md lists the rooms, in the order of their imports."""
