"""Configuration: a deployment file, flags and environment become frozen structs (:mod:`.deployment_file`); what one router process is
started with (:mod:`.router_spec`).
"""
