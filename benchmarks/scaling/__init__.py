"""The scaling study of `launch/scaling_study.py`: how a step scales over ranks and nodes, beside what the planner
predicts. Read `cells.py` first, then `command.py`.
"""
