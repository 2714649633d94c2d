"""A discrete-event simulator around the production objects: routing core, stream table, scheduler. Random fault schedules prove them.

``python -m orchestrator.sim`` runs schedules; time, network and engine are simulated, decisions are not.
"""
