"""Reports: a run or a sweep as terminal tables, as one self-contained page, and as JSON."""
