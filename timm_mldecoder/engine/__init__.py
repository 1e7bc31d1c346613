"""What `train.py`, `validate.py` and the commands run; CONTRIBUTING.md lists the rooms and the order of their imports."""
