-- The tables of release 0.1 on PostgreSQL, as `create_all` made them.
CREATE TABLE packages (
	model VARCHAR(63) NOT NULL,
	version VARCHAR(64) NOT NULL,
	profile VARCHAR(63) NOT NULL,
	at DOUBLE PRECISION NOT NULL,
	data TEXT NOT NULL,
	PRIMARY KEY (model, version, profile)
);
CREATE TABLE withdrawn (
	manifest VARCHAR(80) NOT NULL,
	at DOUBLE PRECISION NOT NULL,
	PRIMARY KEY (manifest)
);
CREATE TABLE gateways (
	gateway_id VARCHAR(63) NOT NULL,
	blueprint VARCHAR(63) NOT NULL,
	enrolled TEXT,
	sequence BIGINT NOT NULL,
	report TEXT,
	failure TEXT,
	PRIMARY KEY (gateway_id)
);
CREATE INDEX ix_gateways_blueprint ON gateways (blueprint);
CREATE TABLE windows (
	id VARCHAR(64) NOT NULL,
	blueprint VARCHAR(63) NOT NULL,
	ended_at DOUBLE PRECISION NOT NULL,
	data TEXT NOT NULL,
	PRIMARY KEY (id)
);
CREATE INDEX windows_by_time ON windows (blueprint, ended_at);
CREATE TABLE blueprints (
	name VARCHAR(63) NOT NULL,
	plan TEXT NOT NULL,
	judged BOOLEAN NOT NULL,
	PRIMARY KEY (name)
);
CREATE TABLE ended_rollouts (
	rollout VARCHAR(80) NOT NULL,
	view TEXT NOT NULL,
	PRIMARY KEY (rollout)
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
