-- The tables of release 0.1 on PostgreSQL, as `create_all` made them.
CREATE TABLE pending_batches (
	id VARCHAR(64) NOT NULL,
	ended_at DOUBLE PRECISION NOT NULL,
	data TEXT NOT NULL,
	traceparent VARCHAR(64),
	PRIMARY KEY (id)
);
CREATE INDEX ix_pending_batches_ended_at ON pending_batches (ended_at);
CREATE TABLE members (
	gateway_id VARCHAR(63) NOT NULL,
	blueprint VARCHAR(63) NOT NULL,
	labels TEXT NOT NULL,
	PRIMARY KEY (gateway_id)
);
CREATE TABLE offers (
	rollout VARCHAR(80) NOT NULL,
	release VARCHAR(80) NOT NULL,
	blueprint VARCHAR(63) NOT NULL,
	version VARCHAR(64) NOT NULL,
	since DOUBLE PRECISION NOT NULL,
	stages TEXT,
	PRIMARY KEY (rollout, release)
);
CREATE INDEX offers_by_release ON offers (blueprint, release);
CREATE TABLE opened (
	rollout VARCHAR(80) NOT NULL,
	stage INTEGER NOT NULL,
	PRIMARY KEY (rollout)
);
CREATE TABLE caught_up (
	stream VARCHAR(63) NOT NULL,
	sequence INTEGER NOT NULL,
	PRIMARY KEY (stream)
);
CREATE TABLE journal (
	position BIGSERIAL NOT NULL,
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
CREATE INDEX ix_journal_published ON journal (published);
CREATE TABLE consumed (
	id VARCHAR(200) NOT NULL,
	PRIMARY KEY (id)
);
