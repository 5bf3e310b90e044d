"""Everything that knows DeepSpeed: partitioned parameters, state access, write-back, the facade over its optimizers."""
