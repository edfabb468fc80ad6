"""Files that a crash leaves whole: checkpoints, outputs, plain data, and whose folder is whose."""
