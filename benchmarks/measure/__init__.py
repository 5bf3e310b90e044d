"""What is measured and how: bytes counted, models built, ranks started, results written; and the parts of a benchmark
that another one may time as well. Read `counting.py` first, then `ranks.py`.
"""
