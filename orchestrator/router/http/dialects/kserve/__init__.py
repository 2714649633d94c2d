"""KServe v2 and Triton's generate extension, in JSON."""
