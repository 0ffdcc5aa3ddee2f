"""From files, data sets and the standard library to rows of token ids; see the README in this folder for the steps."""
