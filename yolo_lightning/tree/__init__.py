"""The WordTree: classes as a hierarchy, built from WordNet and labels."""
