"""Files of other libraries, in and out."""
