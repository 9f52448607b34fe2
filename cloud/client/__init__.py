"""Every public verb, written once over a backend.

``cloud``       the verbs
``arguments``   arguments checked against the function, and cut into chunks
``later``       calls pickled now and submitted later
``results``     outcomes into values and exceptions
``info``        what ``info`` tells
``callbacks``   the thread that runs callbacks
``progress``    how far jobs are, shown
"""

from cloud.client.cloud import Cloud

__all__ = ["Cloud"]
