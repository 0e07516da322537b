DROP TABLE heads;
DROP TABLE watched;
