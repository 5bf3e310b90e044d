"""`python -m lift_ds.training`, and with a launcher `deepspeed --module lift_ds.training`."""

from lift_ds.training.command import main

if __name__ == "__main__":
    main()
