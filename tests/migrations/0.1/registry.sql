BEGIN TRANSACTION;
CREATE TABLE aliases (
	model VARCHAR(63) NOT NULL, 
	alias VARCHAR(63) NOT NULL, 
	version VARCHAR(64) NOT NULL, 
	PRIMARY KEY (model, alias)
);
INSERT INTO "aliases" VALUES('smollm2','stable','1.0.1');
CREATE TABLE consumed (
	id VARCHAR(200) NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "consumed" VALUES('registry/9b2f6e0c-consumed');
CREATE TABLE jobs (
	model VARCHAR(63) NOT NULL, 
	version VARCHAR(64) NOT NULL, 
	profile VARCHAR(63) NOT NULL, 
	recipes TEXT NOT NULL, 
	progress TEXT NOT NULL, 
	progress_at DOUBLE NOT NULL, 
	PRIMARY KEY (model, version, profile)
);
INSERT INTO "jobs" VALUES('smollm2','1.0.1','edge-small','int8 int4','int4: quantize 1/4',1767323045.678);
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
INSERT INTO "journal" VALUES(1,'model:smollm2',1,'766aae05-b30e-553a-8b92-c1b59832e22c','slmops.model.version_registered.v1','{"model":"smollm2","version":"1.0.0","digest":"sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","format":"gguf","architecture":"llama","files":[{"path":"onnx/model.onnx","digest":"sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","size_bytes":86000000},{"path":"golden.jsonl","digest":"sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","size_bytes":120}],"golden":{"mediaType":"application/vnd.cncf.model.dataset.v1.raw","digest":"sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","size":120,"annotations":{"org.cncf.model.filepath":"golden.jsonl"}},"at":"2026-01-02T03:04:05.678000Z"}','2026-01-02T03:04:35+00:00',NULL,1);
INSERT INTO "journal" VALUES(2,'model:smollm2',2,'dce7cf2e-1b35-5c43-8f93-7b6c3265da4b','slmops.model.version_registered.v1','{"model":"smollm2","version":"1.0.1","digest":"sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","format":"gguf","architecture":"llama","files":[{"path":"onnx/model.onnx","digest":"sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","size_bytes":86000000},{"path":"golden.jsonl","digest":"sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","size_bytes":120}],"golden":{"mediaType":"application/vnd.cncf.model.dataset.v1.raw","digest":"sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","size":120,"annotations":{"org.cncf.model.filepath":"golden.jsonl"}},"at":"2026-01-02T03:04:05.678000Z"}','2026-01-02T03:04:35+00:00',NULL,0);
INSERT INTO "journal" VALUES(3,'model:smollm2',3,'7c59a250-b816-5efa-ad77-db9c99a81151','slmops.model.alias_moved.v1','{"model":"smollm2","alias":"stable","version":"1.0.1","previous":"1.0.0","at":"2026-01-02T03:04:05.678000Z"}','2026-01-02T03:04:35+00:00',NULL,0);
INSERT INTO "journal" VALUES(4,'model:smollm2',4,'21c7dde3-a23c-56a4-aa92-f280b50e0e95','slmops.model.version_retired.v1','{"model":"smollm2","version":"1.0.0","reason":"superseded by 1.0.1","at":"2026-01-02T03:04:05.678000Z"}','2026-01-02T03:04:35+00:00',NULL,0);
CREATE TABLE named_blobs (
	kind VARCHAR(120) NOT NULL, 
	model VARCHAR(63) NOT NULL, 
	version VARCHAR(64) NOT NULL, 
	digest VARCHAR(80) NOT NULL, 
	document BOOLEAN NOT NULL, 
	PRIMARY KEY (kind, model, version, digest)
);
INSERT INTO "named_blobs" VALUES('slmops.variant.optimized.v1','smollm2','1.0.1','sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa',0);
INSERT INTO "named_blobs" VALUES('slmops.variant.optimized.v1','smollm2','1.0.1','sha256:cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc',0);
INSERT INTO "named_blobs" VALUES('slmops.variant.optimized.v1','smollm2','1.0.1','sha256:6666666666666666666666666666666666666666666666666666666666666666',1);
INSERT INTO "named_blobs" VALUES('slmops.variant.optimized.v1','smollm2','1.0.1','sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb',0);
INSERT INTO "named_blobs" VALUES('slmops.package.published.v1','smollm2','1.0.1','sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd',1);
INSERT INTO "named_blobs" VALUES('slmops.package.published.v1','smollm2','1.0.1','sha256:eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee',0);
CREATE TABLE named_until (
	kind VARCHAR(120) NOT NULL, 
	sequence BIGINT NOT NULL, 
	PRIMARY KEY (kind)
);
INSERT INTO "named_until" VALUES('slmops.variant.optimized.v1',1);
INSERT INTO "named_until" VALUES('slmops.package.published.v1',2);
INSERT INTO "named_until" VALUES('slmops.package.withdrawn.v1',3);
CREATE TABLE packages (
	manifest VARCHAR(80) NOT NULL, 
	model VARCHAR(63) NOT NULL, 
	version VARCHAR(64) NOT NULL, 
	at DOUBLE NOT NULL, 
	"view" TEXT NOT NULL, 
	PRIMARY KEY (manifest)
);
INSERT INTO "packages" VALUES('sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd','smollm2','1.0.1',1767323045.678,'{"profile":"edge-small","recipe":"int4","manifest":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","size":1234},"signature":{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","digest":"sha256:eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee","size":4321},"size_bytes":86000120,"at":"2026-01-02T03:04:05.678000Z"}');
CREATE TABLE variants (
	model VARCHAR(63) NOT NULL, 
	version VARCHAR(64) NOT NULL, 
	profile VARCHAR(63) NOT NULL, 
	recipe VARCHAR(63) NOT NULL, 
	at DOUBLE NOT NULL, 
	"view" TEXT NOT NULL, 
	PRIMARY KEY (model, version, profile, recipe)
);
INSERT INTO "variants" VALUES('smollm2','1.0.1','edge-small','int4',1767323045.678,'{"model":"smollm2","version":"1.0.1","profile":"edge-small","recipe":"int4","digest":"sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","gate":"passed","chosen":true,"reason":"int4: 3.1 × smaller, KL 0.12 ≤ 0.5","evaluation":{"bytes":86000000,"kl":0.12,"kl_low":0.11,"kl_high":0.14,"top1":0.83,"top1_low":0.81,"top1_high":0.85,"ppl":21.5,"ppl_low":19.75,"ppl_high":23.25,"reference_ppl":20.25,"tokens_per_s":80.5,"ttft_s":0.15,"peak_rss_bytes":222000000,"tasks":{"everyday":0.85},"golden_passed":3,"golden_total":4,"repetition":0.25,"joules_per_token":0.05,"joules_source":"modelled"},"report":{"mediaType":"application/json","digest":"sha256:cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc","size":2048}}');
INSERT INTO "variants" VALUES('smollm2','1.0.1','edge-small','int8',1767323045.678,'{"model":"smollm2","version":"1.0.1","profile":"edge-small","recipe":"int8","digest":"sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","gate":"refused","chosen":false,"reason":"160 MB are allowed, it has 170 MB","evaluation":{"bytes":86000000,"kl":0.12,"kl_low":0.11,"kl_high":0.14,"top1":0.83,"top1_low":0.81,"top1_high":0.85,"ppl":21.5,"ppl_low":19.75,"ppl_high":23.25,"reference_ppl":20.25,"tokens_per_s":80.5,"ttft_s":0.15,"peak_rss_bytes":222000000,"tasks":{"everyday":0.85},"golden_passed":3,"golden_total":4,"repetition":0.25,"joules_per_token":0.05,"joules_source":"modelled"},"report":{"mediaType":"application/json","digest":"sha256:cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc","size":2048}}');
CREATE TABLE versions (
	id INTEGER NOT NULL, 
	model VARCHAR(63) NOT NULL, 
	version VARCHAR(64) NOT NULL, 
	state VARCHAR(20) NOT NULL, 
	registered TEXT NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (model, version)
);
INSERT INTO "versions" VALUES(1,'smollm2','1.0.0','retired','{"model":"smollm2","version":"1.0.0","digest":"sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","format":"gguf","architecture":"llama","files":[{"path":"onnx/model.onnx","digest":"sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","size_bytes":86000000},{"path":"golden.jsonl","digest":"sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","size_bytes":120}],"golden":{"mediaType":"application/vnd.cncf.model.dataset.v1.raw","digest":"sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","size":120,"annotations":{"org.cncf.model.filepath":"golden.jsonl"}},"at":"2026-01-02T03:04:05.678000Z"}');
INSERT INTO "versions" VALUES(2,'smollm2','1.0.1','registered','{"model":"smollm2","version":"1.0.1","digest":"sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","format":"gguf","architecture":"llama","files":[{"path":"onnx/model.onnx","digest":"sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","size_bytes":86000000},{"path":"golden.jsonl","digest":"sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","size_bytes":120}],"golden":{"mediaType":"application/vnd.cncf.model.dataset.v1.raw","digest":"sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","size":120,"annotations":{"org.cncf.model.filepath":"golden.jsonl"}},"at":"2026-01-02T03:04:05.678000Z"}');
CREATE TABLE withdrawn_blobs (
	digest VARCHAR(80) NOT NULL, 
	at DOUBLE NOT NULL, 
	PRIMARY KEY (digest)
);
INSERT INTO "withdrawn_blobs" VALUES('sha256:9999999999999999999999999999999999999999999999999999999999999999',1767323045.678);
INSERT INTO "withdrawn_blobs" VALUES('sha256:8888888888888888888888888888888888888888888888888888888888888888',1767323045.678);
CREATE INDEX ix_journal_published ON journal (published);
COMMIT;
