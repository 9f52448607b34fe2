"""How jobs live and run: one state machine over a store of jobs and an executor of attempts."""
