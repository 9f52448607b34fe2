"""Callables, values and exceptions <-> bytes: the only room that pickles.

Used on the two ends of a job only, the submitting process and the worker; everything between sees opaque bytes.

``pickling``    values and by-value functions, and the shared globals of a program's ``__main__``
``functions``   a function made ready to travel, and which of them need not be pickled again
``exceptions``  exceptions with their causes, contexts, notes and groups
``explain``     which part of an object refused, in words
"""
