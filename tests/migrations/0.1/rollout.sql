BEGIN TRANSACTION;
CREATE TABLE blueprints (
	name VARCHAR(63) NOT NULL, 
	"plan" TEXT NOT NULL, 
	judged BOOLEAN NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "blueprints" VALUES('edge-chat','{"blueprint":"edge-chat","generation":4,"stable":null,"candidate":{"rollout":"edge-chat-2","release":{"revision":1,"model":"smollm2","version":"1.0.1","role":"chat","manifest":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","size":1234},"signature":{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","digest":"sha256:eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee","size":4321},"size_bytes":86000120,"min_tokens_per_s":5.0,"max_rss_bytes":1000000000,"probe":{"min_pass_share":1.0,"max_ttft_s":10.0},"soak":{"seconds":5.0,"golden_every_s":1.0},"runtime":{"max_tokens":256,"context_tokens":2048},"telemetry":{"every_s":2.0}},"stages":[{"name":"canary","percent":10.0,"selector":{"ring":"canary"}},{"name":"fleet","percent":100.0,"selector":{}}],"stage":0},"previous":null,"traceparent":null}',1);
CREATE TABLE consumed (
	id VARCHAR(200) NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "consumed" VALUES('rollout/9b2f6e0c-consumed');
CREATE TABLE ended_rollouts (
	rollout VARCHAR(80) NOT NULL, 
	"view" TEXT NOT NULL, 
	PRIMARY KEY (rollout)
);
INSERT INTO "ended_rollouts" VALUES('edge-chat-1','{"rollout":"edge-chat-1","blueprint":"edge-chat","state":"aborted","version":"1.0.1","model":"smollm2","stage":0,"stages":[{"name":"canary","targets":0,"committed":0,"failed":0,"waiting":""},{"name":"fleet","targets":1,"committed":0,"failed":1,"waiting":""}],"reason":"asked by the operator","started_at":"2026-01-02T03:04:05.678000Z","ended_at":"2026-01-02T03:04:05.678000Z","candidate_window":{"blueprint":"edge-chat","release":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","version":"1.0.1","started_at":"2026-01-02T03:04:05.678000Z","ended_at":"2026-01-02T03:04:35Z","gateways":3,"requests":120,"failed_requests":1,"golden_passed":30,"golden_failed":1,"completion_tokens":2400,"decode_seconds":30.5,"ttft_seconds":12.25},"stable_window":null}');
CREATE TABLE gateways (
	gateway_id VARCHAR(63) NOT NULL, 
	blueprint VARCHAR(63) NOT NULL, 
	enrolled TEXT, 
	sequence BIGINT NOT NULL, 
	report TEXT, 
	failure TEXT, 
	PRIMARY KEY (gateway_id)
);
INSERT INTO "gateways" VALUES('gw-1','edge-chat','{"gateway_id":"gw-1","blueprint":"edge-chat","public_key":"UAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA","labels":{"ring":"canary"},"at":"2026-01-02T03:04:05.678000Z"}',8,'{"gateway_id":"gw-1","blueprint":"edge-chat","sequence":8,"labels":{"ring":"canary"},"phase":"idle","running":"sha256:9999999999999999999999999999999999999999999999999999999999999999","running_version":"1.0.0","target":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","problem":{"code":"inference_failed","what":"the probe failed","where":"golden prompt 1","fix":"Push another version."},"plan_generation":3,"measured":{"tokens_per_s":80.5,"ttft_s":0.15},"at":"2026-01-02T03:04:05.678000Z"}','{"gateway_id":"gw-1","blueprint":"edge-chat","sequence":7,"labels":{"ring":"canary"},"phase":"failed","running":"sha256:9999999999999999999999999999999999999999999999999999999999999999","running_version":"1.0.0","target":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","problem":{"code":"inference_failed","what":"the probe failed","where":"golden prompt 1","fix":"Push another version."},"plan_generation":3,"measured":{"tokens_per_s":80.5,"ttft_s":0.15},"at":"2026-01-02T03:04:05.678000Z"}');
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
INSERT INTO "journal" VALUES(1,'gateway:gw-1',1,'89558eea-1e5c-5243-b57b-436f3d87e0e3','slmops.gateway.enrolled.v1','{"gateway_id":"gw-1","blueprint":"edge-chat","public_key":"UAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA","labels":{"ring":"canary"},"at":"2026-01-02T03:04:05.678000Z"}','2026-01-02T03:04:35+00:00',NULL,1);
INSERT INTO "journal" VALUES(2,'blueprint:edge-chat',1,'d31010ea-a285-5775-bf03-ab34fcc91161','slmops.blueprint.applied.v1','{"blueprint":"edge-chat","revision":1,"spec":{"name":"edge-chat","profile":"edge-small","role":"chat","model":"smollm2","stages":[{"name":"canary","percent":10.0,"selector":{"ring":"canary"}},{"name":"fleet","percent":100.0,"selector":{}}],"gate":{"max_failed_gateways":0,"max_error_rate":0.01,"min_requests":1,"max_slowdown":0.5,"min_decode_s":1.0,"deadline_s":600.0},"probe":{"min_pass_share":1.0,"max_ttft_s":10.0},"soak":{"seconds":5.0,"golden_every_s":1.0},"runtime":{"max_tokens":256,"context_tokens":2048},"telemetry":{"every_s":2.0},"privacy":{"prompts_leave_device":false}},"at":"2026-01-02T03:04:05.678000Z"}','2026-01-02T03:04:35+00:00',NULL,0);
INSERT INTO "journal" VALUES(3,'blueprint:edge-chat',2,'3d80975b-e541-5d0e-a1a6-12ec5c55792d','slmops.rollout.started.v1','{"blueprint":"edge-chat","rollout":"edge-chat-1","candidate":{"revision":1,"model":"smollm2","version":"1.0.1","role":"chat","manifest":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","size":1234},"signature":{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","digest":"sha256:eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee","size":4321},"size_bytes":86000120,"min_tokens_per_s":5.0,"max_rss_bytes":1000000000,"probe":{"min_pass_share":1.0,"max_ttft_s":10.0},"soak":{"seconds":5.0,"golden_every_s":1.0},"runtime":{"max_tokens":256,"context_tokens":2048},"telemetry":{"every_s":2.0}},"stable":null,"stages":[{"name":"canary","percent":10.0,"selector":{"ring":"canary"}},{"name":"fleet","percent":100.0,"selector":{}}],"at":"2026-01-02T03:04:05.678000Z"}','2026-01-02T03:04:35+00:00',NULL,0);
INSERT INTO "journal" VALUES(4,'blueprint:edge-chat',3,'6827bb00-5fc1-50e3-bb71-bd41d74029b3','slmops.rollout.aborted.v1','{"blueprint":"edge-chat","rollout":"edge-chat-1","reason":"asked by the operator","at":"2026-01-02T03:04:05.678000Z"}','2026-01-02T03:04:35+00:00',NULL,0);
INSERT INTO "journal" VALUES(5,'blueprint:edge-chat',4,'9386a21a-990e-5f7a-9167-55a7b46ce6ff','slmops.rollout.started.v1','{"blueprint":"edge-chat","rollout":"edge-chat-2","candidate":{"revision":1,"model":"smollm2","version":"1.0.1","role":"chat","manifest":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","size":1234},"signature":{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","digest":"sha256:eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee","size":4321},"size_bytes":86000120,"min_tokens_per_s":5.0,"max_rss_bytes":1000000000,"probe":{"min_pass_share":1.0,"max_ttft_s":10.0},"soak":{"seconds":5.0,"golden_every_s":1.0},"runtime":{"max_tokens":256,"context_tokens":2048},"telemetry":{"every_s":2.0}},"stable":null,"stages":[{"name":"canary","percent":10.0,"selector":{"ring":"canary"}},{"name":"fleet","percent":100.0,"selector":{}}],"at":"2026-01-02T03:04:35Z"}','2026-01-02T03:04:35+00:00',NULL,0);
CREATE TABLE packages (
	model VARCHAR(63) NOT NULL, 
	version VARCHAR(64) NOT NULL, 
	profile VARCHAR(63) NOT NULL, 
	at DOUBLE NOT NULL, 
	data TEXT NOT NULL, 
	PRIMARY KEY (model, version, profile)
);
INSERT INTO "packages" VALUES('smollm2','1.0.1','edge-small',1767323045.678,'{"model":"smollm2","version":"1.0.1","profile":"edge-small","recipe":"int4","variant":"sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff","manifest":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","size":1234},"signature":{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","digest":"sha256:eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee","size":4321},"size_bytes":86000120,"at":"2026-01-02T03:04:05.678000Z"}');
CREATE TABLE windows (
	id VARCHAR(64) NOT NULL, 
	blueprint VARCHAR(63) NOT NULL, 
	ended_at DOUBLE NOT NULL, 
	data TEXT NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "windows" VALUES('window-1','edge-chat',1767323075.0,'{"blueprint":"edge-chat","release":"sha256:dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd","version":"1.0.1","started_at":"2026-01-02T03:04:05.678000Z","ended_at":"2026-01-02T03:04:35Z","gateways":3,"requests":120,"failed_requests":1,"golden_passed":30,"golden_failed":1,"completion_tokens":2400,"decode_seconds":30.5,"ttft_seconds":12.25}');
CREATE TABLE withdrawn (
	manifest VARCHAR(80) NOT NULL, 
	at DOUBLE NOT NULL, 
	PRIMARY KEY (manifest)
);
INSERT INTO "withdrawn" VALUES('sha256:9999999999999999999999999999999999999999999999999999999999999999',1767323045.678);
CREATE INDEX ix_gateways_blueprint ON gateways (blueprint);
CREATE INDEX windows_by_time ON windows (blueprint, ended_at);
CREATE INDEX ix_journal_published ON journal (published);
COMMIT;
