"""Tables of training steps, every way to run one fixed-point model beside the others (``python -m bench tables``)."""
