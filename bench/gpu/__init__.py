"""What has to be seen on a device, in one command; `rehearse.py` lets all of it run without one."""
