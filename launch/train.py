"""Fine-tune a causal language model with LIFT, with full fine-tuning, or with LoRA.

    deepspeed launch/train.py --deepspeed ds_configs/lift_zero2.json \\
        --model_name_or_path MODEL --train_file rows.json --output_dir tuned

The job itself is `lift_ds.training`, so `deepspeed --module lift_ds.training ...` is the same where lift_ds is
installed without this folder. Without DeepSpeed it is one plain process (`lift-ds train ...`). `--help` lists flags.
"""

from lift_ds.training.command import main

if __name__ == "__main__":
    main()
