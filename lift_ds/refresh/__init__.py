"""When and where principal weights are selected again, and what happens to their states.

Read `driver` first: it runs after every applied step.
"""
