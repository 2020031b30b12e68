-- The tables of release 0.1 on PostgreSQL, as `create_all` made them.
CREATE TABLE packages (
	manifest VARCHAR(80) NOT NULL,
	data TEXT NOT NULL,
	PRIMARY KEY (manifest)
);
CREATE TABLE withdrawn (
	manifest VARCHAR(80) NOT NULL,
	at DOUBLE PRECISION NOT NULL,
	PRIMARY KEY (manifest)
);
CREATE TABLE gateways (
	gateway_id VARCHAR(63) NOT NULL,
	blueprint VARCHAR(63) NOT NULL,
	at DOUBLE PRECISION NOT NULL,
	PRIMARY KEY (gateway_id)
);
CREATE TABLE running (
	gateway_id VARCHAR(63) NOT NULL,
	manifest VARCHAR(80),
	at DOUBLE PRECISION NOT NULL,
	PRIMARY KEY (gateway_id)
);
CREATE INDEX ix_running_manifest ON running (manifest);
CREATE TABLE deltas (
	target VARCHAR(80) NOT NULL,
	base VARCHAR(80) NOT NULL,
	model VARCHAR(63) NOT NULL,
	size_bytes BIGINT NOT NULL,
	at DOUBLE PRECISION NOT NULL,
	data TEXT NOT NULL,
	PRIMARY KEY (target, base)
);
CREATE INDEX ix_deltas_model ON deltas (model);
CREATE TABLE trust_metadata (
	role VARCHAR(80) NOT NULL,
	version INTEGER NOT NULL,
	at DOUBLE PRECISION NOT NULL,
	data BYTEA NOT NULL,
	PRIMARY KEY (role, version)
);
CREATE TABLE trust_model_keys (
	model VARCHAR(63) NOT NULL,
	pem TEXT NOT NULL,
	PRIMARY KEY (model)
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
