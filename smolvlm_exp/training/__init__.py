"""One file per algorithm that a trainer option (conf/trainer) names, and what all of them need."""
