# A gateway's image with a package inside. The build runs no command, so it needs no network and can be done on a
# machine with a different processor.
ARG GATEWAY_IMAGE
FROM ${GATEWAY_IMAGE}
# Copied as a tree from the root, so that all folders have the times of the context and the layer always has the same
# digest.
COPY device /
ENV SLMOPS_FACTORY=/opt/factory \
    SLMOPS_TRUSTED_KEY=/opt/factory/trusted.pem \
    SLMOPS_TRUSTED_ROOT=/opt/factory/trusted-root.json \
    SLMOPS_DATA_DIR=/data \
    SLMOPS_ENROL_CREDS=/data/keys/enrol.creds \
    SLMOPS_ENROLMENT_TOKEN=/data/keys/enrolment-token \
    SLMOPS_API_HOST=0.0.0.0 \
    SLMOPS_API_PORT=8080 \
    SLMOPS_HTTP_PORT=8000
# A number, so that tools can see that the user is not root without looking into the image.
USER 10001:10001
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=5s --timeout=5s --start-period=2m --retries=3 \
  CMD ["python", "/opt/healthy.py", "http://127.0.0.1:8000/health"]
