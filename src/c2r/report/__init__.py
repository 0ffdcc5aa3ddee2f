"""Tables and pages made of result files."""
