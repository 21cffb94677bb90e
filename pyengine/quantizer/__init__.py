"""From a checkpoint to its INT8 and INT4 forms: the rule, the pass, and the verification."""
