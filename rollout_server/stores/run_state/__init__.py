"""The run as a state machine in memory: every decision, no waiting and no I/O.

state.py holds the run. Beside it runs, registry, tickets, groups and batches do the requests of stores.base.Store, one function
each. A request raises its errors before its first change, so that a refused one changes nothing, and notes in
`RunState.changes` what must be written before anybody is answered.
"""
