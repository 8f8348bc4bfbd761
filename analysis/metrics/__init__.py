"""One file a metric. The yaml in conf/metric whose `_target_` names it is its registration."""
