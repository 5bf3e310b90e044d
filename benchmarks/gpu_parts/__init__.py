"""What `python -m benchmarks.gpu` runs on a machine with an accelerator.

    cells      one thing to be checked or measured, and what comes of it
    book       the file with the results of a part, from which an interrupted run goes on
    runner     runs the cells of a part in processes of their own, within limits
    machine    the device: its name, driver, memory and how fast that is copied
    check      does it do on this device what it is to do? kernels, training, model_features, stalls
    refresh    how fast entries are selected, and which solver from which size on
    step       how long a step takes and what memory it needs, beside full fine-tuning and LoRA
    plots      pictures of the last two

Read `cells` first, then `check`.
"""
