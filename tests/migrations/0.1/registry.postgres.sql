-- The tables of release 0.1 on PostgreSQL, as `create_all` made them.
CREATE TABLE versions (
	id SERIAL NOT NULL,
	model VARCHAR(63) NOT NULL,
	version VARCHAR(64) NOT NULL,
	state VARCHAR(20) NOT NULL,
	registered TEXT NOT NULL,
	PRIMARY KEY (id),
	UNIQUE (model, version)
);
CREATE TABLE aliases (
	model VARCHAR(63) NOT NULL,
	alias VARCHAR(63) NOT NULL,
	version VARCHAR(64) NOT NULL,
	PRIMARY KEY (model, alias)
);
CREATE TABLE jobs (
	model VARCHAR(63) NOT NULL,
	version VARCHAR(64) NOT NULL,
	profile VARCHAR(63) NOT NULL,
	recipes TEXT NOT NULL,
	progress TEXT NOT NULL,
	progress_at DOUBLE PRECISION NOT NULL,
	PRIMARY KEY (model, version, profile)
);
CREATE TABLE variants (
	model VARCHAR(63) NOT NULL,
	version VARCHAR(64) NOT NULL,
	profile VARCHAR(63) NOT NULL,
	recipe VARCHAR(63) NOT NULL,
	at DOUBLE PRECISION NOT NULL,
	view TEXT NOT NULL,
	PRIMARY KEY (model, version, profile, recipe)
);
CREATE TABLE packages (
	manifest VARCHAR(80) NOT NULL,
	model VARCHAR(63) NOT NULL,
	version VARCHAR(64) NOT NULL,
	at DOUBLE PRECISION NOT NULL,
	view TEXT NOT NULL,
	PRIMARY KEY (manifest)
);
CREATE TABLE named_blobs (
	kind VARCHAR(120) NOT NULL,
	model VARCHAR(63) NOT NULL,
	version VARCHAR(64) NOT NULL,
	digest VARCHAR(80) NOT NULL,
	document BOOLEAN NOT NULL,
	PRIMARY KEY (kind, model, version, digest)
);
CREATE TABLE withdrawn_blobs (
	digest VARCHAR(80) NOT NULL,
	at DOUBLE PRECISION NOT NULL,
	PRIMARY KEY (digest)
);
CREATE TABLE named_until (
	kind VARCHAR(120) NOT NULL,
	sequence BIGINT NOT NULL,
	PRIMARY KEY (kind)
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
