"""What a run of several ranks needs whatever it trains: a watchdog, small exchanges between ranks, the log.

It knows nothing of LIFT. Read `ranks` first.
"""
