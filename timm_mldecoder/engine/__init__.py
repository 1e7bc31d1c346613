"""The training and evaluation engine behind `train.py` and `validate.py`.

options -> build -> loop -> state -> checkpoint -> report, each in a module of that name.
"""
