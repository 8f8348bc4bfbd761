"""From stored videos to claims: metrics, scores, tables, frontiers, figures and the report."""
