"""Measured scaling of full fine-tuning, LoRA and LIFT beside the planner's predictions: `launch/scaling_study.py`."""
