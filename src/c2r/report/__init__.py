"""Tables and HTML pages made from result files."""
