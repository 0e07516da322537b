DROP TABLE reports;
DROP TABLE deliveries;
