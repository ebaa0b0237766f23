"""Handler for a real TorchServe: answers the sizes of what it was sent."""

import json


class Handler:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        answers = []
        for index, row in enumerate(data):
            status = context.get_request_header(index, "x-status")
            if status:
                context.set_response_status(int(status), "As Asked", index)
            context.set_response_header(index, "content-type", "application/json")
            answers.append(json.dumps({name: len(value) for name, value in row.items()}).encode())
        return answers
