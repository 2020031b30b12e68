BEGIN TRANSACTION;
CREATE TABLE consumed (
	id VARCHAR(200) NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "consumed" VALUES('packager/9b2f6e0c-consumed');
CREATE TABLE deltas (
	target VARCHAR(80) NOT NULL, 
	base VARCHAR(80) NOT NULL, 
	model VARCHAR(63) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	at DOUBLE NOT NULL, 
	data TEXT NOT NULL, 
	PRIMARY KEY (target, base)
);
INSERT INTO "deltas" VALUES('sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd','sha256:7777777777777777777777777777777777777777777777777777777777777777','smollm2',675432,1767323045.678,'{"model":"smollm2","version":"1.0.1","base":"sha256:7777777777777777777777777777777777777777777777777777777777777777","target":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","delta":{"mediaType":"application/vnd.slmops.delta.v1","digest":"sha256:8888888888888888888888888888888888888888888888888888888888888888","size":675432},"full_bytes":86000120,"at":"2026-01-02T03:04:05.678000Z"}');
CREATE TABLE gateways (
	gateway_id VARCHAR(63) NOT NULL, 
	blueprint VARCHAR(63) NOT NULL, 
	at DOUBLE NOT NULL, 
	PRIMARY KEY (gateway_id)
);
INSERT INTO "gateways" VALUES('gw-1','edge-chat',1767323045.678);
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
INSERT INTO "journal" VALUES(1,'package:smollm2:1.0.0:edge-small',1,'a9ad5dc8-91bc-5e1a-95e2-15b0e359d45f','slmops.package.published.v1','{"model":"smollm2","version":"1.0.0","profile":"edge-small","recipe":"int4","variant":"sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","manifest":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:9999999999999999999999999999999999999999999999999999999999999999","size":1234},"signature":{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","digest":"sha256:eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee","size":4321},"size_bytes":86000120,"at":"2026-01-02T03:04:05.678000Z"}','2026-01-02T03:04:35+00:00',NULL,1);
INSERT INTO "journal" VALUES(2,'package:smollm2:1.0.0:edge-small',2,'13a9406a-2819-5bb4-9a2c-ca5ba1b55765','slmops.package.withdrawn.v1','{"model":"smollm2","version":"1.0.0","profile":"edge-small","manifest":"sha256:9999999999999999999999999999999999999999999999999999999999999999","signature":"sha256:8888888888888888888888888888888888888888888888888888888888888888","reason":"superseded by 1.0.1","at":"2026-01-02T03:04:05.678000Z"}','2026-01-02T03:04:35+00:00',NULL,0);
INSERT INTO "journal" VALUES(3,'package:smollm2:1.0.1:edge-small',1,'2c652e94-9172-5355-9c6b-bf0ec7a7d887','slmops.package.published.v1','{"model":"smollm2","version":"1.0.1","profile":"edge-small","recipe":"int4","variant":"sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","manifest":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","size":1234},"signature":{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","digest":"sha256:eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee","size":4321},"size_bytes":86000120,"at":"2026-01-02T03:04:05.678000Z"}','2026-01-02T03:04:35+00:00',NULL,0);
INSERT INTO "journal" VALUES(4,'package:smollm2:1.0.1:edge-small',2,'f3ee2719-54e1-56f4-a74e-63965627c5ef','slmops.package.delta_published.v1','{"model":"smollm2","version":"1.0.1","base":"sha256:9999999999999999999999999999999999999999999999999999999999999999","target":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","delta":{"mediaType":"application/vnd.slmops.delta.v1","digest":"sha256:8888888888888888888888888888888888888888888888888888888888888888","size":675432},"full_bytes":86000120,"at":"2026-01-02T03:04:05.678000Z"}','2026-01-02T03:04:35+00:00',NULL,0);
INSERT INTO "journal" VALUES(5,'package:smollm2:1.0.1:edge-small',3,'742d0ced-81a9-55cc-bb52-16c7ccfe71bf','slmops.package.delta_published.v1','{"model":"smollm2","version":"1.0.1","base":"sha256:7777777777777777777777777777777777777777777777777777777777777777","target":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","delta":{"mediaType":"application/vnd.slmops.delta.v1","digest":"sha256:8888888888888888888888888888888888888888888888888888888888888888","size":675432},"full_bytes":86000120,"at":"2026-01-02T03:04:05.678000Z"}','2026-01-02T03:04:35+00:00',NULL,0);
INSERT INTO "journal" VALUES(6,'package:smollm2:1.0.1:edge-small',4,'593f524f-0aee-5a2b-bce0-f6b401fad8da','slmops.package.delta_withdrawn.v1','{"model":"smollm2","version":"1.0.1","base":"sha256:9999999999999999999999999999999999999999999999999999999999999999","target":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","delta":"sha256:8888888888888888888888888888888888888888888888888888888888888888","at":"2026-01-02T03:04:05.678000Z"}','2026-01-02T03:04:35+00:00',NULL,0);
CREATE TABLE packages (
	manifest VARCHAR(80) NOT NULL, 
	data TEXT NOT NULL, 
	PRIMARY KEY (manifest)
);
INSERT INTO "packages" VALUES('sha256:9999999999999999999999999999999999999999999999999999999999999999','{"model":"smollm2","version":"1.0.0","profile":"edge-small","recipe":"int4","variant":"sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","manifest":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:9999999999999999999999999999999999999999999999999999999999999999","size":1234},"signature":{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","digest":"sha256:eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee","size":4321},"size_bytes":86000120,"at":"2026-01-02T03:04:05.678000Z"}');
INSERT INTO "packages" VALUES('sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd','{"model":"smollm2","version":"1.0.1","profile":"edge-small","recipe":"int4","variant":"sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","manifest":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","size":1234},"signature":{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","digest":"sha256:eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee","size":4321},"size_bytes":86000120,"at":"2026-01-02T03:04:05.678000Z"}');
CREATE TABLE running (
	gateway_id VARCHAR(63) NOT NULL, 
	manifest VARCHAR(80), 
	at DOUBLE NOT NULL, 
	PRIMARY KEY (gateway_id)
);
INSERT INTO "running" VALUES('gw-1','sha256:9999999999999999999999999999999999999999999999999999999999999999',1767323045.678);
CREATE TABLE trust_metadata (
	role VARCHAR(80) NOT NULL, 
	version INTEGER NOT NULL, 
	at DOUBLE NOT NULL, 
	data BLOB NOT NULL, 
	PRIMARY KEY (role, version)
);
INSERT INTO "trust_metadata" VALUES('root',1,1767323045.678,X'7B227369676E6564223A207B2276657273696F6E223A20317D7D');
INSERT INTO "trust_metadata" VALUES('root',2,1767323045.678,X'7B227369676E6564223A207B2276657273696F6E223A20327D7D');
CREATE TABLE trust_model_keys (
	model VARCHAR(63) NOT NULL, 
	pem TEXT NOT NULL, 
	PRIMARY KEY (model)
);
INSERT INTO "trust_model_keys" VALUES('smollm2','-----BEGIN PUBLIC KEY-----
');
CREATE TABLE withdrawn (
	manifest VARCHAR(80) NOT NULL, 
	at DOUBLE NOT NULL, 
	PRIMARY KEY (manifest)
);
INSERT INTO "withdrawn" VALUES('sha256:9999999999999999999999999999999999999999999999999999999999999999',1767323045.678);
CREATE INDEX ix_running_manifest ON running (manifest);
CREATE INDEX ix_deltas_model ON deltas (model);
CREATE INDEX ix_journal_published ON journal (published);
COMMIT;
