"""From files, data sets and the standard library to rows of token ids; the README beside this file draws the way."""
