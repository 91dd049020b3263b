"""A federation where NVIDIA FLARE runs already: the same server and members, their parcels carried by FLARE's calls.

Only server.py and site.py, which FLARE loads, and the sending in job.py need the package `nvflare`."""
