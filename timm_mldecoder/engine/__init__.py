"""What train.py, validate.py and the commands run. CONTRIBUTING.md lists the subpackages in the order of imports."""
