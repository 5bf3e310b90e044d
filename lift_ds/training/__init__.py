"""The shipped trainer: a job from command line to saved model, on TRL's SFTTrainer. Needs the `trl` extra.

Read `main` first.
"""
