"""Pictures against pictures: scores, the judge, the table."""
