"""Callables, values and exceptions <-> bytes: the only room that pickles.

Used on the two ends of a job only, the submitting process and the worker; everything between sees opaque bytes.

``pickling``    values and by-value functions, and the shared globals of a program's ``__main__``
``functions``   a function made ready to travel, and which of them need not be pickled again
``namespace``   which ``__main__`` is meant
``variants``    functions that differ in nothing but values, made again and again
``exceptions``  exceptions with their causes, contexts, notes and groups
``large``       which large globals are what they were
``facts``       what a function refers to, and what others can import
``memory``      files in memory: made, mapped, counted
``shared``      large buffers in them, beside the bytes
``explain``     which part of an object refused, in words
"""
