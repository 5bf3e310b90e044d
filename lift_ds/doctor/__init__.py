"""What is wrong with the nodes of a job, before a model loads: `lift-ds doctor`, `python -m lift_ds.doctor`.

    node, devices, folder      what a process finds out about its own node: no communication, plain dicts
    contact, bandwidth         what it finds out about the others: addresses, clocks, transport, speed of links
    meeting                    how the processes exchange this: every wait has a limit, and who is absent is known
    findings, links            from all of it to findings: pure functions
    report                     the screen, the JSON file and the exit code

Read `examination` first, which says what is done in which order.
"""
