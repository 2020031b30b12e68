BEGIN TRANSACTION;
CREATE TABLE caught_up (
	stream VARCHAR(63) NOT NULL, 
	sequence INTEGER NOT NULL, 
	PRIMARY KEY (stream)
);
INSERT INTO "caught_up" VALUES('EVENTS',2);
CREATE TABLE consumed (
	id VARCHAR(200) NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "consumed" VALUES('telemetry/9b2f6e0c-consumed');
INSERT INTO "consumed" VALUES('telemetry/c7d2364a-487e-520c-9d19-67d9c33a79ed');
CREATE TABLE journal (
	position INTEGER NOT NULL, 
	stream VARCHAR(200) NOT NULL, 
	version INTEGER NOT NULL, 
	id VARCHAR(64) NOT NULL, 
	type VARCHAR(120) NOT NULL, 
	data TEXT NOT NULL, 
	time VARCHAR(40) NOT NULL, 
	traceparent VARCHAR(64), 
	published BOOLEAN NOT NULL, 
	PRIMARY KEY (position), 
	UNIQUE (stream, version), 
	UNIQUE (id)
);
INSERT INTO "journal" VALUES(1,'window:edge-chat',1,'c9529ba3-daed-5e9c-8950-e0ddce638b7f','slmops.cohort.measured.v1','{"blueprint":"edge-chat","window":{"blueprint":"edge-chat","release":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","version":"1.0.1","started_at":"2026-01-02T03:04:05.678000Z","ended_at":"2026-01-02T03:04:35Z","gateways":3,"requests":120,"failed_requests":1,"golden_passed":30,"golden_failed":1,"completion_tokens":2400,"decode_seconds":30.5,"ttft_seconds":12.25},"at":"2026-01-02T03:04:05.678000Z"}','2026-01-02T03:04:35+00:00',NULL,1);
CREATE TABLE members (
	gateway_id VARCHAR(63) NOT NULL, 
	blueprint VARCHAR(63) NOT NULL, 
	labels TEXT NOT NULL, 
	PRIMARY KEY (gateway_id)
);
INSERT INTO "members" VALUES('gw-1','edge-chat','{"ring": "a"}');
CREATE TABLE offers (
	rollout VARCHAR(80) NOT NULL, 
	release VARCHAR(80) NOT NULL, 
	blueprint VARCHAR(63) NOT NULL, 
	version VARCHAR(64) NOT NULL, 
	since DOUBLE NOT NULL, 
	stages TEXT, 
	PRIMARY KEY (rollout, release)
);
INSERT INTO "offers" VALUES('edge-chat-2','sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd','edge-chat','1.0.1',1767323045.678,'[{"name":"canary","percent":10.0,"selector":{"ring":"canary"}},{"name":"fleet","percent":100.0,"selector":{}}]');
INSERT INTO "offers" VALUES('edge-chat-2','sha256:9999999999999999999999999999999999999999999999999999999999999999','edge-chat','1.0.0',1767323045.678,NULL);
CREATE TABLE opened (
	rollout VARCHAR(80) NOT NULL, 
	stage INTEGER NOT NULL, 
	PRIMARY KEY (rollout)
);
INSERT INTO "opened" VALUES('edge-chat-2',1);
CREATE TABLE pending_batches (
	id VARCHAR(64) NOT NULL, 
	ended_at DOUBLE NOT NULL, 
	data TEXT NOT NULL, 
	traceparent VARCHAR(64), 
	PRIMARY KEY (id)
);
INSERT INTO "pending_batches" VALUES('c7d2364a-487e-520c-9d19-67d9c33a79ed',1767323075.0,'{"batch_id":"gw-1/17","gateway_id":"gw-1","blueprint":"edge-chat","release":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","version":"1.0.1","started_at":"2026-01-02T03:04:05.678000Z","ended_at":"2026-01-02T03:04:35Z","requests":40,"synthetic_requests":10,"failed_requests":1,"golden_passed":10,"golden_failed":0,"prompt_tokens":900,"completion_tokens":800,"decode_seconds":10.5,"ttft_seconds":4.25,"peak_rss_bytes":222000000}','00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01');
CREATE INDEX ix_pending_batches_ended_at ON pending_batches (ended_at);
CREATE INDEX offers_by_release ON offers (blueprint, release);
CREATE INDEX ix_journal_published ON journal (published);
COMMIT;
