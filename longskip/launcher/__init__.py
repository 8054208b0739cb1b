"""The command line, launching of ranks, the demo and the doctor."""
